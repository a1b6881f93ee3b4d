"""Scripts that make the golden files of the tests with the reference implementations. They import tests/support."""
