//! The numbers of a decision that are not counted: measured by an engine, modelled by a simulation.

use std::collections::BTreeMap;

use crate::{Error, Result};

/// What a look is told besides the load. Finite and not negative.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Inputs {
    /// What one row (a token's choice of an expert) takes in a rank's experts, prefill and decode, in microseconds; 0
    /// where no row of that phase was seen.
    pub row_us: [f64; 2],
    /// Weights of one expert.
    pub expert_bytes: f64,
    /// How fast a rank receives weights while it serves, in bytes per microsecond.
    pub migration_bytes_per_us: f64,
    /// What serving waits when a placement switches, in microseconds.
    pub switch_us: f64,
}

const PREFILL_ROW_US: &str = "prefill_row_us";
const DECODE_ROW_US: &str = "decode_row_us";
const EXPERT_BYTES: &str = "expert_bytes";
const MIGRATION_BYTES_PER_US: &str = "migration_bytes_per_us";
const SWITCH_US: &str = "switch_us";

impl Inputs {
    /// As a trace keeps them.
    pub fn to_map(&self) -> BTreeMap<String, f64> {
        let entries = [
            (PREFILL_ROW_US, self.row_us[0]),
            (DECODE_ROW_US, self.row_us[1]),
            (EXPERT_BYTES, self.expert_bytes),
            (MIGRATION_BYTES_PER_US, self.migration_bytes_per_us),
            (SWITCH_US, self.switch_us),
        ];
        entries.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
    }

    /// Out of a trace.
    ///
    /// # Errors
    /// [`Error::Impossible`] naming the number that is missing or senseless.
    pub fn from_map(map: &BTreeMap<String, f64>) -> Result<Inputs> {
        let get = |name: &str| match map.get(name) {
            Some(value) if value.is_finite() && *value >= 0.0 => Ok(*value),
            Some(value) => {
                Err(Error::Impossible(format!("a decision's {name} is {value}, not 0 or more and finite")))
            }
            None => Err(Error::Impossible(format!("a decision lacks its {name}"))),
        };
        Ok(Inputs {
            row_us: [get(PREFILL_ROW_US)?, get(DECODE_ROW_US)?],
            expert_bytes: get(EXPERT_BYTES)?,
            migration_bytes_per_us: get(MIGRATION_BYTES_PER_US)?,
            switch_us: get(SWITCH_US)?,
        })
    }

    /// How long a rank receives so many experts while serving goes on, and then waits for the switch.
    pub(super) fn moving_us(&self, experts: usize) -> f64 {
        let bytes = experts as f64 * self.expert_bytes;
        let travel = if bytes > 0.0 { bytes / self.migration_bytes_per_us } else { 0.0 };
        travel + self.switch_us
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inputs_come_back_out_of_a_trace() {
        let inputs = Inputs {
            row_us: [0.1, 1.0 / 3.0],
            expert_bytes: 44e6,
            migration_bytes_per_us: 5e3,
            switch_us: 50.0,
        };
        let map = inputs.to_map();
        assert_eq!(Inputs::from_map(&map).unwrap(), inputs);
        for (name, value) in &map {
            let mut wrong = map.clone();
            wrong.remove(name);
            let error = Inputs::from_map(&wrong).unwrap_err().to_string();
            assert!(error.contains(&format!("lacks its {name}")), "{error}");
            wrong.insert(name.clone(), -value);
            assert!(Inputs::from_map(&wrong).unwrap_err().to_string().contains(&format!("{name} is -")));
        }
        assert_eq!(inputs.moving_us(0), 50.0);
        assert_eq!(inputs.moving_us(2), 88e6 / 5e3 + 50.0);
    }
}
