"""PhotoWords: a 224-pixel open-vocabulary encoder from PyPI, and every command measured on it with real photographs."""
