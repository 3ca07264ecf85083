"""The data half: index → pages → documents → tags → clusters → training rows. Imports no torch."""
