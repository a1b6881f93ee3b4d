"""x"""


def install():
    pass
