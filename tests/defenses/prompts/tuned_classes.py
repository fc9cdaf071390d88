"""The classes of these tests."""

CLASSES = ("apple", "hot dog", "police car", "snail")
