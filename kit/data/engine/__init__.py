"""Run the stages of the data half: Spark, and a child process that may be killed."""
