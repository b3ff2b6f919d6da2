//! Checkpoints in Hugging Face layout.
