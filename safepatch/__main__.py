"""`python -m safepatch` is the command line."""

from safepatch.cli import main

if __name__ == "__main__":
    main()
