//! Reports: what a simulation found ([`data`]), for files, spreadsheets and browsers.
//!
//! A [`data::Report`] is plain data that a JSON file can hold. [`csv`] is what a spreadsheet reads, and [`html::page`]
//! one file that any browser shows, without scripts and without anything from elsewhere.

pub mod data;
mod read;
pub mod figures;
pub mod csv;
pub mod html;
