"""What a pattern means (`pattern`), what the GPU does (`plan`), and the symbols both speak in (`symbols`)."""
