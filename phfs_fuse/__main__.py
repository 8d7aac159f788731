"""`python -m phfs_fuse` is `phfs`."""

from phfs_fuse.cli.main import main

if __name__ == "__main__":
    main()
