"""What does the program do when it is killed, fed nonsense, short of room or bereft of a rank? `make torture` counts."""
