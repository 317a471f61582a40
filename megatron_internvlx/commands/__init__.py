"""The commands of `ivlx`: one module each, with `parser()` and `main()`. Programs of tools/ call them too."""
