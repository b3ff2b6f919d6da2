//! Dates for chat templates: Python's `strftime` in UTC and the C locale.

use std::fmt::Write;
use std::time::{SystemTime, UNIX_EPOCH};

const DAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];
const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];

/// A moment in UTC, taken apart.
struct Moment {
    year: i64,
    /// 1..=12
    month: i64,
    /// 1..=31
    day: i64,
    /// 1..=366
    day_of_year: i64,
    /// 0 is Sunday.
    weekday: i64,
    hour: i64,
    minute: i64,
    second: i64,
}

/// Formats `time` (UTC) as Python's `datetime.strftime` would. `None` for a directive outside the common set
/// `%a %A %b %B %d %e %H %I %j %m %M %p %S %y %Y %F %T %D %%`, each with an optional `-` for no padding.
pub(super) fn strftime(format: &str, time: SystemTime) -> Option<String> {
    let moment = Moment::at(time);
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let mut directive = chars.next()?;
        let pad = directive != '-';
        if !pad {
            directive = chars.next()?;
        }
        moment.write(directive, pad, &mut out)?;
    }
    Some(out)
}

impl Moment {
    /// Civil date of a day count, by Howard Hinnant's `civil_from_days`: years begin in March, so that the leap day
    /// is a year's last.
    fn at(time: SystemTime) -> Moment {
        let seconds = match time.duration_since(UNIX_EPOCH) {
            Ok(after) => i64::try_from(after.as_secs()).unwrap_or(i64::MAX),
            Err(before) => i64::try_from(before.duration().as_secs()).map_or(i64::MIN, |s| -s),
        };
        let (days, in_day) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
        let shifted = days + 719_468;
        let (era, day_of_era) = (shifted.div_euclid(146_097), shifted.rem_euclid(146_097));
        let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let from_march = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let month_from_march = (5 * from_march + 2) / 153;
        let day = from_march - (153 * month_from_march + 2) / 5 + 1;
        let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
        let year = year_of_era + era * 400 + i64::from(month <= 2);
        let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
        let day_of_year = if month <= 2 { from_march - 305 } else { from_march + 60 + i64::from(leap) };
        Moment {
            year,
            month,
            day,
            day_of_year,
            weekday: (days + 4).rem_euclid(7),
            hour: in_day / 3600,
            minute: in_day / 60 % 60,
            second: in_day % 60,
        }
    }

    fn write(&self, directive: char, pad: bool, out: &mut String) -> Option<()> {
        let hour12 = (self.hour + 11) % 12 + 1;
        match directive {
            'Y' => number(self.year, 4, '0', pad, out),
            'y' => number(self.year.rem_euclid(100), 2, '0', pad, out),
            'm' => number(self.month, 2, '0', pad, out),
            'd' => number(self.day, 2, '0', pad, out),
            'e' => number(self.day, 2, ' ', pad, out),
            'j' => number(self.day_of_year, 3, '0', pad, out),
            'H' => number(self.hour, 2, '0', pad, out),
            'I' => number(hour12, 2, '0', pad, out),
            'M' => number(self.minute, 2, '0', pad, out),
            'S' => number(self.second, 2, '0', pad, out),
            'p' => out.push_str(if self.hour < 12 { "AM" } else { "PM" }),
            'a' => out.push_str(&DAYS[self.weekday as usize][..3]),
            'A' => out.push_str(DAYS[self.weekday as usize]),
            'b' => out.push_str(&MONTHS[self.month as usize - 1][..3]),
            'B' => out.push_str(MONTHS[self.month as usize - 1]),
            'F' => self.all("Y-m-d", out)?,
            'T' => self.all("H:M:S", out)?,
            'D' => self.all("m/d/y", out)?,
            '%' => out.push('%'),
            _ => return None,
        }
        Some(())
    }

    /// Writes several padded directives; what is no letter stands for itself.
    fn all(&self, directives: &str, out: &mut String) -> Option<()> {
        for c in directives.chars() {
            if c.is_ascii_alphabetic() { self.write(c, true, out)? } else { out.push(c) }
        }
        Some(())
    }
}

fn number(value: i64, width: usize, fill: char, pad: bool, out: &mut String) {
    let written = match (pad, fill) {
        (false, _) => write!(out, "{value}"),
        (true, '0') => write!(out, "{value:0width$}"),
        (true, _) => write!(out, "{value:width$}"),
    };
    written.expect("a String takes any text");
}

#[cfg(test)]
mod tests {
    use super::strftime;
    use std::time::{Duration, UNIX_EPOCH};

    /// Expected values are Python's `datetime.fromtimestamp(s, timezone.utc).strftime(format)`.
    #[test]
    fn dates_are_pythons() {
        let check = |seconds: u64, format: &str, expected: &str| {
            let time = UNIX_EPOCH + Duration::from_secs(seconds);
            assert_eq!(strftime(format, time).as_deref(), Some(expected), "{seconds} {format}");
        };
        let all = "%a %A %b %B %d %e %H %I %j %m %M %p %S %y %Y %F %T %D %% %-d %-m %-I";
        check(
            0,
            all,
            "Thu Thursday Jan January 01  1 00 12 001 01 00 AM 00 70 1970 1970-01-01 00:00:00 01/01/70 % 1 1 12",
        );
        check(
            951782399,
            all,
            "Mon Monday Feb February 28 28 23 11 059 02 59 PM 59 00 2000 2000-02-28 23:59:59 02/28/00 % 28 2 11",
        );
        check(
            951868800,
            all,
            "Wed Wednesday Mar March 01  1 00 12 061 03 00 AM 00 00 2000 2000-03-01 00:00:00 03/01/00 % 1 3 12",
        );
        check(
            1709210096,
            all,
            "Thu Thursday Feb February 29 29 12 12 060 02 34 PM 56 24 2024 2024-02-29 12:34:56 02/29/24 % 29 2 12",
        );
        check(
            1735689599,
            all,
            "Tue Tuesday Dec December 31 31 23 11 366 12 59 PM 59 24 2024 2024-12-31 23:59:59 12/31/24 % 31 12 11",
        );
        check(
            4102444800,
            all,
            "Fri Friday Jan January 01  1 00 12 001 01 00 AM 00 00 2100 2100-01-01 00:00:00 01/01/00 % 1 1 12",
        );
        check(
            1721923200,
            all,
            "Thu Thursday Jul July 25 25 16 04 207 07 00 PM 00 24 2024 2024-07-25 16:00:00 07/25/24 % 25 7 4",
        );
    }

    #[test]
    fn unknown_directives_are_refused() {
        assert_eq!(strftime("%Q", UNIX_EPOCH), None);
        assert_eq!(strftime("100%", UNIX_EPOCH), None);
        assert_eq!(strftime("", UNIX_EPOCH).as_deref(), Some(""));
    }
}
