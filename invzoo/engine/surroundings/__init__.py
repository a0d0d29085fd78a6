"""What a call sees besides its inputs, part by part."""
