"""The words of the language, one small file each; `registry` lists them."""
