"""What a device does in a way of its own; each function chooses by the device of its tensors."""
