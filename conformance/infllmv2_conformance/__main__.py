"""Run the command as `python -m infllmv2_conformance`."""

from .cli import main

if __name__ == "__main__":
    main()
