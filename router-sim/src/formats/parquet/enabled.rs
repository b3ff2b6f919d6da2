//! The reader.

use std::collections::HashMap;
use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use ::parquet::file::reader::{FileReader, SerializedFileReader};
use ::parquet::record::reader::RowIter;
use ::parquet::record::{Field, Row};

use super::super::gather::{Gathered, MAX_LAYERS, Name, Piece, PieceReader};
use super::super::{Options, in_file};
use crate::{Error, Result};

const IDS: [&str; 5] = ["indices", "topk_ids", "expert_ids", "topk", "routed_experts"];
const WEIGHTS: [&str; 3] = ["scores", "topk_weights", "weights"];
const LAYER: [&str; 2] = ["layer", "layer_id"];
const REQUEST: [&str; 3] = ["request_id", "req_id", "sequence_id"];
const TOKEN: [&str; 2] = ["token_idx", "position"];

/// Rows of a file, cut into pieces of one layer each.
pub struct Rows {
    rows: RowIter<'static>,
    read: u64,
    over: bool,
    /// Pieces of the row at hand, last layer first.
    pieces: Vec<Piece>,
    /// Tokens so far per request and layer, where rows do not count them.
    next_token: HashMap<(String, usize), u64>,
}

/// Opens a file.
///
/// # Errors
/// [`Error::Io`], [`Error::File`].
pub fn open(path: &Path, options: &Options) -> Result<Gathered<Rows>> {
    Gathered::new(path, Rows::open(path)?, Rows::open(path)?, options)
}

impl Rows {
    fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(|source| Error::Io { path: path.into(), source })?;
        let rows = guarded(|| {
            let reader = SerializedFileReader::new(file).map_err(|e| e.to_string())?;
            let columns = reader.metadata().file_metadata().schema_descr().root_schema().get_fields();
            if !columns.iter().any(|column| IDS.contains(&column.name())) {
                return Err(format!("no column {}", IDS.join(", ")));
            }
            Ok(RowIter::from_file_into(Box::new(reader)))
        });
        let rows = rows.map_err(|why| in_file(path, why))?;
        Ok(Rows { rows, read: 0, over: false, pieces: Vec::new(), next_token: HashMap::new() })
    }

    /// Cuts a row into pieces.
    fn take(&mut self, row: &Row) -> Result<(), String> {
        let find = |names: &[&str]| {
            row.get_column_iter().find(|(name, _)| names.contains(&name.as_str())).map(|(_, field)| field)
        };
        let ids = find(&IDS).ok_or("no expert ids")?;
        let ids = nested(ids, &|field| integer(field).ok_or_else(|| format!("{field} is no expert id")))?;
        let weights = match find(&WEIGHTS) {
            None => vec![Vec::new(); ids.len()],
            Some(field) => {
                nested(field, &|field| float(field).ok_or_else(|| format!("{field} is no weight")))?
            }
        };
        if weights.len() != ids.len() {
            return Err(format!("weights of {} layers, expert ids of {}", weights.len(), ids.len()));
        }
        let first_layer = match find(&LAYER).map(integer) {
            None => 0,
            Some(layer) => layer.and_then(|n| usize::try_from(n).ok()).ok_or("the layer is no index")?,
        };
        if first_layer.saturating_add(ids.len()) > MAX_LAYERS {
            return Err(format!("layer {first_layer} is not below {MAX_LAYERS}"));
        }
        let request = find(&REQUEST).map_or(String::new(), |field| match field {
            Field::Str(text) => text.clone(),
            other => other.to_string(),
        });
        let token = find(&TOKEN).map(|field| integer(field).and_then(|n| u64::try_from(n).ok()));
        let token = token.map(|token| token.ok_or("the token is no index")).transpose()?;
        for (index, (ids, weights)) in ids.into_iter().zip(weights).enumerate().rev() {
            let layer = first_layer + index;
            let counted = self.next_token.entry((request.clone(), layer)).or_insert(0);
            let first_token = token.unwrap_or(*counted);
            *counted += 1;
            let request = request.parse().map_or_else(|_| Name::Text(request.clone()), Name::Number);
            self.pieces.push(Piece { request, first_token, layer, ids: vec![ids], weights });
        }
        Ok(())
    }
}

impl PieceReader for Rows {
    fn next_piece(&mut self) -> Result<Option<Piece>, String> {
        loop {
            if let Some(piece) = self.pieces.pop() {
                return Ok(Some(piece));
            }
            if self.over {
                return Ok(None);
            }
            let next = guarded(|| self.rows.next().transpose().map_err(|e| e.to_string()));
            match next.inspect_err(|_| self.over = true)? {
                None => self.over = true,
                Some(row) => {
                    self.read += 1;
                    self.take(&row)?;
                }
            }
        }
    }

    fn record(&self) -> u64 {
        self.read.saturating_sub(1)
    }
}

/// The crate panics on some files that are not sound; here that is an error as any other.
fn guarded<T>(read: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(read)).unwrap_or_else(|_| Err("the parquet file is not sound".to_owned()))
}

/// A list, or a list of lists.
fn nested<T>(field: &Field, convert: &impl Fn(&Field) -> Result<T, String>) -> Result<Vec<Vec<T>>, String> {
    let Field::ListInternal(list) = field else { return Err(format!("{field} is no list")) };
    let inner = list.elements().iter().all(|field| matches!(field, Field::ListInternal(_)));
    match inner && !list.elements().is_empty() {
        true => {
            let of_layer =
                |field: &Field| nested(field, convert).map(|lists| lists.into_iter().flatten().collect());
            list.elements().iter().map(of_layer).collect()
        }
        false => Ok(vec![list.elements().iter().map(convert).collect::<Result<_, _>>()?]),
    }
}

fn integer(field: &Field) -> Option<i64> {
    match field {
        Field::Byte(n) => Some(i64::from(*n)),
        Field::Short(n) => Some(i64::from(*n)),
        Field::Int(n) => Some(i64::from(*n)),
        Field::Long(n) => Some(*n),
        Field::UByte(n) => Some(i64::from(*n)),
        Field::UShort(n) => Some(i64::from(*n)),
        Field::UInt(n) => Some(i64::from(*n)),
        Field::ULong(n) => i64::try_from(*n).ok(),
        _ => None,
    }
}

fn float(field: &Field) -> Option<f32> {
    match field {
        Field::Float16(x) => Some(x.to_f32()),
        Field::Float(x) => Some(*x),
        Field::Double(x) => Some(*x as f32),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use ::parquet::data_type::{ByteArray, ByteArrayType, Int32Type};
    use ::parquet::file::writer::SerializedFileWriter;
    use ::parquet::schema::parser::parse_message_type;

    use super::*;
    use crate::formats::{Input, open as open_any};
    use crate::stream::{TokenBatch, TokenStream};

    /// Three tokens of two requests in layers 3 and 4, layer by layer.
    fn write(path: &Path) {
        let schema = "message m { required binary req_id (STRING); required int32 layer; required group indices (LIST) { repeated group list { required int32 element (INTEGER(16,true)); } } }";
        let schema = Arc::new(parse_message_type(schema).unwrap());
        let mut writer =
            SerializedFileWriter::new(File::create(path).unwrap(), schema, Arc::default()).unwrap();
        let mut group = writer.next_row_group().unwrap();
        let names = ["a", "b", "a", "a", "b", "a"].map(ByteArray::from);
        let mut column = group.next_column().unwrap().unwrap();
        column.typed::<ByteArrayType>().write_batch(&names, None, None).unwrap();
        column.close().unwrap();
        let mut column = group.next_column().unwrap().unwrap();
        column.typed::<Int32Type>().write_batch(&[3, 3, 3, 4, 4, 4], None, None).unwrap();
        column.close().unwrap();
        let mut column = group.next_column().unwrap().unwrap();
        let ids = [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3];
        let repeated: Vec<i16> = (0..12).map(|i| i % 2).collect();
        column.typed::<Int32Type>().write_batch(&ids, Some(&[1; 12]), Some(&repeated)).unwrap();
        column.close().unwrap();
        group.close().unwrap();
        writer.close().unwrap();
    }

    #[test]
    fn rows_of_layers_become_tokens() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("record.parquet");
        write(&path);
        let Ok(Input::Tokens(mut tokens)) = open_any(&path, &Options::default()) else { panic!("tokens") };
        assert_eq!((tokens.shape().layer_ids.as_slice(), tokens.shape().experts), (&[3, 4][..], 8));
        let mut batch = TokenBatch::default();
        assert!(tokens.next_batch(&mut batch).unwrap());
        assert_eq!(batch.layer(0, 2), [0, 1, 2, 3, 4, 5]);
        assert_eq!(batch.layer(1, 2), [6, 7, 0, 1, 2, 3]);
        let who: Vec<_> = batch.rows.iter().map(|row| (row.info.request, row.info.position)).collect();
        assert_eq!((who[0].0, who[0].1, who[2].0, who[2].1), (who[0].0, 0, who[0].0, 1));
        assert_ne!(who[0].0, who[1].0);
    }

    #[test]
    fn unsound_files_are_errors() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("record.parquet");
        write(&path);
        let bytes = std::fs::read(&path).unwrap();
        for at in 4..bytes.len() {
            let mut mangled = bytes.clone();
            mangled[at] ^= 0x55;
            std::fs::write(&path, &mangled).unwrap();
            if let Ok(Input::Tokens(mut tokens)) =
                open_any(&path, &Options { experts: Some(8), ..Options::default() })
            {
                let mut batch = TokenBatch::default();
                while let Ok(true) = tokens.next_batch(&mut batch) {}
            }
        }
    }
}
