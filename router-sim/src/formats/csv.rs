//! Loads as CSV, in three shapes:
//!
//! - wide, with a header: `step,layer,e0,e1,...`, a row per step and layer; `window` is as good as `step`, which may be
//!   missing, and so are other columns, a domain for instance;
//! - long, with a header: `step,layer,expert,tokens`, a row per count; what is missing is 0;
//! - bare, without a header: a row per layer, a column per expert.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io::Write;
use std::path::Path;

use ::csv::{ReaderBuilder, StringRecord};

use super::memory::Collected;
use super::number::Number;
use super::source::{self, MAX_IN_MEMORY, Output};
use super::{Options, in_file};
use crate::stream::LoadStream;
use crate::{Error, Result};

/// Counts per step and layer.
type Table = BTreeMap<u64, BTreeMap<usize, Vec<u64>>>;

/// Where a row's fields are.
enum Columns {
    Wide { step: Option<usize>, layer: usize, experts: Vec<usize> },
    Long { step: Option<usize>, layer: usize, expert: usize, tokens: usize },
    Bare { experts: usize },
}

/// Reads a file.
///
/// # Errors
/// [`Error::Io`], [`Error::File`] when its header is of no known shape, [`Error::Record`] when no row is usable.
pub fn read(path: &Path, options: &Options) -> Result<Collected> {
    let source = source::open(path, options.progress.clone())?;
    let refuse = |why: String| in_file(path, why);
    let mut reader = ReaderBuilder::new().has_headers(false).flexible(true).from_reader(source);
    let mut record = StringRecord::new();
    let mut next = |record: &mut StringRecord| reader.read_record(record).map_err(|e| refuse(e.to_string()));
    if !next(&mut record)? {
        return Err(refuse("no rows".into()));
    }
    let columns = columns(&record).map_err(refuse)?;
    let (mut table, mut errors, mut number) = (Table::new(), VecDeque::new(), 0u64);
    let mut held = 0;
    let mut at_hand = matches!(columns, Columns::Bare { .. });
    loop {
        if at_hand {
            match take(&columns, &record, number, &mut table, options) {
                Ok(cells) => held += cells * 8,
                Err(why) => errors.push_back((number, format!("line {}: {why}", number + 1))),
            }
            if held > MAX_IN_MEMORY as usize {
                return Err(refuse(format!(
                    "more than {MAX_IN_MEMORY} bytes of counts, the limit for .csv; use .npy"
                )));
            }
        }
        number += 1;
        at_hand = next(&mut record)?;
        if !at_hand {
            break;
        }
    }
    if let Some((record, why)) = errors.pop_front_if(|_| table.is_empty()) {
        // Without a usable row there is no shape either.
        return Err(Error::Record { path: path.into(), record, why });
    }
    collect(path, &columns, table, errors, options).map_err(refuse)
}

fn columns(first: &StringRecord) -> Result<Columns, String> {
    if first.iter().all(|field| field.trim().parse::<f64>().is_ok()) {
        return Ok(Columns::Bare { experts: first.len() });
    }
    let find = |names: &[&str]| first.iter().position(|field| names.contains(&field.trim()));
    let step = find(&["step", "window"]);
    let layer = find(&["layer", "layer_id"]).ok_or("the header has no column `layer`")?;
    if let (Some(expert), Some(tokens)) = (find(&["expert", "expert_id"]), find(&["tokens", "count", "load"]))
    {
        return Ok(Columns::Long { step, layer, expert, tokens });
    }
    let experts: Vec<usize> = (0..first.len()).map_while(|e| find(&[&format!("e{e}")])).collect();
    match experts.is_empty() {
        true => Err("the header has neither columns e0, e1, ... nor `expert` and `tokens`".into()),
        false => Ok(Columns::Wide { step, layer, experts }),
    }
}

/// Enters one row; the cells that it added.
fn take(
    columns: &Columns,
    record: &StringRecord,
    number: u64,
    table: &mut Table,
    options: &Options,
) -> Result<usize, String> {
    let field =
        |column: usize| record.get(column).map(str::trim).ok_or_else(|| format!("no column {column}"));
    let index = |column: usize| -> Result<usize, String> {
        let text = field(column)?;
        let index = text.parse().ok().filter(|n| *n < 1 << 20);
        index.ok_or_else(|| format!("{text:?} is no index below {}", 1 << 20))
    };
    let step_of = |step: &Option<usize>| step.map_or(Ok(0), index);
    let tokens = |column: usize| -> Result<u64, String> {
        let text = field(column)?;
        let number = match text.parse::<i128>() {
            Ok(n) => Number::Int(n),
            Err(_) => Number::Float(text.parse().map_err(|_| format!("{text:?} is no number"))?),
        };
        number.tokens(options.scale)
    };
    let (step, layer, counts) = match columns {
        Columns::Wide { step, layer, experts } => {
            let counts: Result<Vec<u64>, String> = experts.iter().map(|column| tokens(*column)).collect();
            (step_of(step)?, index(*layer)?, counts?)
        }
        Columns::Bare { experts } => {
            if record.len() != *experts {
                return Err(format!("{} columns, expected {experts}", record.len()));
            }
            let counts: Result<Vec<u64>, String> = (0..*experts).map(tokens).collect();
            (0, number as usize + options.first_layer.unwrap_or(0), counts?)
        }
        Columns::Long { step, layer, expert, tokens: column } => {
            let (step, layer, expert) = (step_of(step)?, index(*layer)?, index(*expert)?);
            if expert >= 1 << 16 {
                return Err(format!("expert {expert} is not below {}", 1 << 16));
            }
            let count = tokens(*column)?;
            let row = table.entry(step as u64).or_default().entry(layer).or_default();
            let added = (expert + 1).saturating_sub(row.len());
            row.resize(row.len() + added, 0);
            row[expert] = row[expert]
                .checked_add(count)
                .ok_or_else(|| format!("expert {expert}: tokens exceed 64 bits"))?;
            return Ok(added);
        }
    };
    let added = counts.len();
    match table.entry(step as u64).or_default().insert(layer, counts) {
        None => Ok(added),
        Some(_) => Err(format!("step {step}, layer {layer} is there twice")),
    }
}

/// Windows of the steps that have every layer.
fn collect(
    path: &Path,
    columns: &Columns,
    mut table: Table,
    mut errors: VecDeque<(u64, String)>,
    options: &Options,
) -> Result<Collected, String> {
    let layers: BTreeSet<usize> = table.values().flat_map(|step| step.keys().copied()).collect();
    let widest = table.values().flat_map(|step| step.values().map(Vec::len)).max().unwrap_or(0);
    let experts =
        options.experts.filter(|_| matches!(columns, Columns::Long { .. })).unwrap_or(widest).max(widest);
    if matches!(columns, Columns::Long { .. }) {
        for step in table.values_mut() {
            layers.iter().for_each(|layer| step.entry(*layer).or_default().resize(experts, 0));
        }
    }
    let mut windows = VecDeque::new();
    for (number, (step, rows)) in table.into_iter().enumerate() {
        match layers.iter().find(|layer| !rows.contains_key(layer)) {
            Some(missing) => errors.push_back((number as u64, format!("step {step} has no layer {missing}"))),
            None => windows.push_back((number as u64, rows.into_values().flatten().collect())),
        }
    }
    Collected::new(path, layers.into_iter().collect(), experts, windows, errors, options)
}

/// Writes the wide form.
///
/// # Errors
/// Those of the stream, [`Error::Io`].
pub fn write(path: &Path, loads: &mut dyn LoadStream) -> Result<u64> {
    let mut output = Output::create(path)?;
    let mut window = loads.empty_window();
    let names: Vec<String> = (0..window.experts()).map(|expert| format!("e{expert}")).collect();
    writeln!(output, "step,layer,{}", names.join(",")).map_err(|e| output.error(e))?;
    let mut step = 0;
    while loads.next_window(&mut window)? {
        for (layer, id) in window.layer_ids().iter().enumerate() {
            let counts: Vec<String> = window.totals(layer).map(|count| count.to_string()).collect();
            writeln!(output, "{step},{id},{}", counts.join(",")).map_err(|e| output.error(e))?;
        }
        step += 1;
    }
    output.finish_with(step)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stream::windows::WindowReader;

    fn loads(text: &str) -> Result<(Vec<usize>, Vec<Vec<u64>>), String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("load.csv");
        std::fs::write(&path, text).unwrap();
        let mut reader = read(&path, &Options::default()).map_err(|e| e.to_string())?;
        let (mut window, mut windows) = (reader.empty_window(), Vec::new());
        while reader.next_window(&mut window).map_err(|why| format!("{}: {why}", reader.record()))? {
            windows.push(
                (0..window.layers()).flat_map(|layer| window.totals(layer).collect::<Vec<_>>()).collect(),
            );
        }
        Ok((window.layer_ids().to_vec(), windows))
    }

    #[test]
    fn all_shapes() {
        let wide = "layer,window,domain,e0,e1\n1,0,novel,5,6\n1,1,drama,7,8\n2,0,novel,1,2\n2,1,drama,3,4\n";
        assert_eq!(loads(wide).unwrap(), (vec![1, 2], vec![vec![5, 6, 1, 2], vec![7, 8, 3, 4]]));
        let long = "layer,expert,tokens\n4,1,9\n3,0,7\n4,1,1\n";
        assert_eq!(loads(long).unwrap(), (vec![3, 4], vec![vec![7, 0, 0, 10]]));
        assert_eq!(loads("1,2,3\n4,5,6\n").unwrap(), (vec![0, 1], vec![vec![1, 2, 3, 4, 5, 6]]));
    }

    #[test]
    fn refusals() {
        for (text, expected) in [
            ("", "no rows"),
            ("a,b\n1,2\n", "no column `layer`"),
            ("layer,x\n1,2\n", "neither columns e0"),
            ("1,2\n3\n", "1: line 2: 1 columns, expected 2"),
            ("layer,e0\n1,-4\n", "line 2: -4 tokens are negative"),
            ("layer,e0\n1,nan\n", "NaN is no number of tokens"),
            ("layer,e0\n1,99999999999999999999\n", "exceed 64 bits"),
            ("layer,e0\nx,4\n", "\"x\" is no index"),
            ("layer,e0\n1,4\n1,4\n", "layer 1 is there twice"),
            ("step,layer,e0\n0,1,4\n0,2,4\n5,2,4\n", "step 5 has no layer 1"),
            ("layer,expert,tokens\n1,70000,4\n", "not below 65536"),
        ] {
            let message = loads(text).unwrap_err();
            assert!(message.contains(expected), "{message:?} should contain {expected:?}");
        }
    }
}
