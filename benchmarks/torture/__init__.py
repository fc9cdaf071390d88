"""What becomes of the program when it is killed, fed nonsense, short of room or bereft of a rank: `make torture`."""
