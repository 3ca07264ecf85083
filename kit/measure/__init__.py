"""What the runs cost and what they bought: speed, MFU and memory; the models' words side by side."""
