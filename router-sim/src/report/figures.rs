//! Numbers for people: three figures, and a unit that fits.

/// With the largest unit that leaves at least 1 before the point.
fn with_unit(value: f64, units: &[(f64, &str)]) -> String {
    let magnitude = value.abs();
    // 999.6 of one unit would be shown as 1000: it is 1 of the next.
    let unit = units.iter().rev().find(|(size, _)| magnitude >= size * 0.9995).or(units.first());
    let (size, name) = unit.copied().unwrap_or((1.0, ""));
    format!("{}{name}", figures(value / size))
}

/// Three figures, no more digits than they need.
pub fn figures(value: f64) -> String {
    match value.abs() {
        _ if !value.is_finite() => "–".into(),
        0.0 => "0".into(),
        x if x >= 99.95 => format!("{value:.0}"),
        x if x >= 9.995 => format!("{value:.1}"),
        x if x >= 0.0005 => format!("{value:.2}"),
        _ => format!("{value:.0e}"),
    }
}

/// Bytes, in powers of 1000.
pub fn bytes(value: f64) -> String {
    with_unit(value, &[(1.0, " B"), (1e3, " kB"), (1e6, " MB"), (1e9, " GB"), (1e12, " TB"), (1e15, " PB")])
}

/// A time given in microseconds.
pub fn micros(value: f64) -> String {
    with_unit(value, &[(1.0, " µs"), (1e3, " ms"), (1e6, " s")])
}

/// A time given in seconds.
pub fn seconds(value: f64) -> String {
    micros(value * 1e6)
}

/// Tokens and other counts.
pub fn count(value: f64) -> String {
    with_unit(value, &[(1.0, ""), (1e3, " k"), (1e6, " M"), (1e9, " G")])
}

/// A large number with its thousands apart.
pub fn whole(value: f64) -> String {
    let digits = format!("{value:.0}");
    let mut out = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) && digit.is_ascii_digit() {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// A share as percent.
pub fn percent(share: f64) -> String {
    match share.is_finite() {
        true if share != 0.0 && share.abs() < 0.0005 => "< 0.1 %".into(),
        true if share.abs() >= 0.0995 => format!("{:.0} %", share * 100.0),
        true => format!("{:.1} %", share * 100.0),
        false => "–".into(),
    }
}

/// A change as percent, with its sign.
pub fn change(share: f64) -> String {
    match share {
        tiny if tiny.abs() < 0.0005 => "0.0 %".to_owned(),
        gain if gain > 0.0 => format!("+{}", percent(gain)),
        loss => percent(loss).replace('-', "−"),
    }
}

/// Balancedness: near 1, the distance to it matters.
pub fn balance(value: f64) -> String {
    match value {
        _ if !value.is_finite() => "–".into(),
        x if (0.99..1.0).contains(&x) => format!("{x:.4}"),
        x => format!("{x:.3}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_fit() {
        let shown = [
            bytes(0.0),
            bytes(999.7),
            bytes(44e6),
            bytes(704e9),
            micros(0.5),
            micros(1234.0),
            seconds(2.0),
            count(215_438.0),
            whole(1_215_438.4),
            whole(999.0),
            percent(0.123),
            percent(0.0234),
            percent(0.0001),
            change(0.31),
            change(-0.05),
            change(0.0001),
            balance(0.99981),
            balance(0.47),
            balance(f64::NAN),
        ];
        let expected = [
            "0 B",
            "1.00 kB",
            "44.0 MB",
            "704 GB",
            "0.50 µs",
            "1.23 ms",
            "2.00 s",
            "215 k",
            "1,215,438",
            "999",
            "12 %",
            "2.3 %",
            "< 0.1 %",
            "+31 %",
            "−5.0 %",
            "0.0 %",
            "0.9998",
            "0.470",
            "–",
        ];
        assert_eq!(shown, expected);
    }
}
