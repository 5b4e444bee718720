"""`python -m fastlm.info` prints the report of `fastlm.info()`."""

from fastlm.info import info

if __name__ == "__main__":
    print(info())
