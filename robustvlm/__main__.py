"""`python -m robustvlm`, and what the installed command calls."""

import signal
import sys


def run() -> None:
    """Run the program; stopped while it is still loading, it ends as it does later."""
    try:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        from robustvlm.core.loading import quick_imports

        with quick_imports():
            from robustvlm.cli.main import main

        main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the end is near: what is left takes no time and no message


if __name__ == "__main__":
    run()
