//! Families as data.
