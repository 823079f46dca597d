"""``python -m manifests``."""

from manifests.cli import manifests

if __name__ == "__main__":
    manifests(prog_name="manifests")
