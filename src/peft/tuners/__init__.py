"""The methods, a file each; LoRA, the flagship, a folder. A method imports the core and `ops`, and no other method."""
