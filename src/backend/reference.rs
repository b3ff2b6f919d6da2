//! Slow, plain loops: the formulas of Backend as code, the reference every fast path is tested against.
