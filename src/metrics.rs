//! Names and descriptions of every metric family.
