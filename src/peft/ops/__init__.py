"""Mathematics without module state: pure functions of tensors, each testable on its own."""
