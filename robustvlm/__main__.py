"""`python -m robustvlm`."""

from __future__ import annotations

from robustvlm.cli.main import main

if __name__ == "__main__":
    main()
