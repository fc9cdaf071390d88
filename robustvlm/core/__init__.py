"""Small types shared by every layer: seeds, passes, precision. Imports nothing from the rest of the package."""
