"""x"""


def check_version():
    pass
