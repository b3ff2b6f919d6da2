//! Shape and type checks shared by all backends.
