"""``python -m reshard``."""

from reshard.cli import reshard

if __name__ == "__main__":
    reshard(prog_name="reshard")
