"""What a training step costs on one GPU and on many: counted, predicted, and held to what real processes do."""
