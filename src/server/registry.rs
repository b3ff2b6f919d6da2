//! The recorder behind the metrics page, spoken to in families of [`crate::metrics`], and the page it renders.

use std::sync::{Mutex, PoisonError};

use metrics::{Counter, Gauge, Histogram, Key, KeyName, Label, Level, Metadata, Recorder};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle, PrometheusRecorder};

use crate::error::{Error, Result};
use crate::metrics::{FAMILIES, Family, Kind};

/// Counters of time end like this and have fractions.
const SECONDS: &str = "_seconds_total";

/// The Prometheus recorder, spoken to in families.
pub(super) struct Registry {
    recorder: PrometheusRecorder,
    handle: PrometheusHandle,
    /// The recorder's counters are integers; seconds are kept here. A std lock: held for one number or one page.
    seconds: Mutex<Vec<Seconds>>,
}

/// A counter of seconds.
struct Seconds {
    family: &'static Family,
    labels: Vec<String>,
    value: f64,
}

impl Registry {
    pub(super) fn new() -> Result<Self> {
        let refused =
            |family: &Family, why: &dyn std::fmt::Display| Error::config(family.name, why.to_string());
        let mut builder = PrometheusBuilder::new();
        for family in FAMILIES {
            // Without buckets the exporter would render a summary.
            if let Kind::Histogram(bounds) = family.kind {
                let matcher = Matcher::Full(family.name.into());
                builder =
                    builder.set_buckets_for_metric(matcher, bounds).map_err(|why| refused(family, &why))?;
            }
        }
        let recorder = builder.build_recorder();
        for family in FAMILIES {
            let (name, help) = (KeyName::from_const_str(family.name), family.help.into());
            match family.kind {
                Kind::Counter if family.name.ends_with(SECONDS) => {}
                Kind::Counter => recorder.describe_counter(name, None, help),
                Kind::Gauge => recorder.describe_gauge(name, None, help),
                Kind::Histogram(_) => recorder.describe_histogram(name, None, help),
            }
        }
        Ok(Registry { handle: recorder.handle(), recorder, seconds: Mutex::default() })
    }

    /// The page as it stands.
    pub(super) fn render(&self) -> String {
        let mut page = self.handle.render();
        let seconds = self.seconds.lock().unwrap_or_else(PoisonError::into_inner);
        let mut described = None;
        for Seconds { family, labels, value } in seconds.iter() {
            if described != Some(family.name) {
                described = Some(family.name);
                page += &format!("# HELP {0} {1}\n# TYPE {0} counter\n", family.name, family.help);
            }
            let labels: Vec<_> =
                family.labels.iter().zip(labels).map(|(name, value)| format!("{name}=\"{value}\"")).collect();
            let labels = if labels.is_empty() { String::new() } else { format!("{{{}}}", labels.join(",")) };
            page += &format!("{}{labels} {value}\n", family.name);
        }
        page
    }

    /// Folds the samples of histograms, which otherwise pile up between two pages.
    pub(super) fn run_upkeep(&self) {
        self.handle.run_upkeep();
    }

    /// Sets a counter of seconds. The series of one family must be set one after the other the first time, as the page
    /// has them in this order.
    pub(super) fn set_seconds(&self, family: &'static Family, labels: &[&str], value: f64) {
        assert!(family.kind == Kind::Counter && family.name.ends_with(SECONDS), "{}", family.name);
        assert_eq!(family.labels.len(), labels.len(), "{}: label values {labels:?}", family.name);
        let mut all = self.seconds.lock().unwrap_or_else(PoisonError::into_inner);
        let known = all.iter_mut().find(|known| known.family.name == family.name && known.labels == labels);
        match known {
            Some(known) => known.value = value,
            None => {
                let labels = labels.iter().map(|&label| label.to_owned()).collect();
                all.push(Seconds { family, labels, value });
            }
        }
    }

    /// The counter of `family` with these label values.
    pub(super) fn counter(&self, family: &Family, values: &[&str]) -> Counter {
        assert!(family.kind == Kind::Counter && !family.name.ends_with(SECONDS), "{}", family.name);
        self.recorder.register_counter(&key(family, values), &METADATA)
    }

    /// The gauge of `family` with these label values.
    pub(super) fn gauge(&self, family: &Family, values: &[&str]) -> Gauge {
        assert_eq!(family.kind, Kind::Gauge, "{}", family.name);
        self.recorder.register_gauge(&key(family, values), &METADATA)
    }

    /// The histogram of `family` with these label values.
    pub(super) fn histogram(&self, family: &Family, values: &[&str]) -> Histogram {
        assert!(matches!(family.kind, Kind::Histogram(_)), "{}", family.name);
        self.recorder.register_histogram(&key(family, values), &METADATA)
    }
}

/// Series on a page.
pub(super) fn count_series(page: &str) -> usize {
    page.lines().filter(|line| !line.starts_with('#') && !line.is_empty()).count()
}

/// The recorder filters by nothing of this.
static METADATA: Metadata<'static> = Metadata::new(module_path!(), Level::INFO, None);

fn key(family: &Family, values: &[&str]) -> Key {
    assert_eq!(
        family.labels.len(),
        values.len(),
        "{}: labels {:?}, values {values:?}",
        family.name,
        family.labels
    );
    let labels = family.labels.iter().zip(values).map(|(name, value)| Label::new(*name, (*value).to_owned()));
    Key::from_parts(family.name, labels.collect::<Vec<_>>())
}
