"""``pyqe serve``: OpenAI's HTTP interface with token quality beside the text (``pip install pyqe[serve]``)."""
