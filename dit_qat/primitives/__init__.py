"""Pure tensor mathematics of quantization; imports torch and the standard library only."""
