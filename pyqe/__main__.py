"""``python -m pyqe``"""

from pyqe.cli import main

if __name__ == "__main__":
    main(prog_name="pyqe")
