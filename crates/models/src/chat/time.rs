//! `strftime_now`: the time in UTC, in C's format language.

use std::fmt::Write;
use std::time::{SystemTime, UNIX_EPOCH};

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
const DAYS: [&str; 7] =
    ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

/// Year, month from 1, day from 1 of a day counted from 1970-01-01, in the Gregorian calendar.
///
/// Years are taken to begin in March, so that the leap day comes last; 400 years have 146097 days (Hinnant,
/// "chrono-compatible low-level date algorithms").
fn civil(days: i64) -> (i64, usize, i64) {
    let since_march_of_year_0 = days + 719_468;
    let era = since_march_of_year_0.div_euclid(146_097);
    let day_of_era = since_march_of_year_0.rem_euclid(146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let months_since_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * months_since_march + 2) / 5 + 1;
    let month = (months_since_march + 2) % 12 + 1;
    (era * 400 + year_of_era + i64::from(month <= 2), month as usize, day)
}

/// The time in this format.
pub(super) fn format(time: SystemTime, format: &str) -> Result<String, String> {
    let seconds = match time.duration_since(UNIX_EPOCH) {
        Ok(after) => i64::try_from(after.as_secs()),
        Err(before) => i64::try_from(before.duration().as_secs()).map(|seconds| -seconds),
    };
    let seconds = seconds.map_err(|_| "the time is out of range".to_owned())?;
    let (days, of_day) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
    let (year, month, day) = civil(days);
    let (hour, minute, second) = (of_day / 3_600, of_day / 60 % 60, of_day % 60);
    let weekday = (days + 4).rem_euclid(7) as usize;
    let half_hour = (hour + 11) % 12 + 1;
    let january_first = {
        let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
        let before = [0, 31, 59, 90, 120, 151, 181, 212, 243, 273, 304, 334][month - 1];
        before + day + i64::from(leap && month > 2)
    };

    let mut out = String::new();
    let mut letters = format.chars();
    while let Some(c) = letters.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let mut letter = letters.next().ok_or("strftime_now: the format ends with %")?;
        let padded = letter != '-';
        if !padded {
            letter = letters.next().ok_or("strftime_now: the format ends with %-")?;
        }
        let mut number = |value: i64, width: usize| {
            let width = if padded { width } else { 1 };
            let _ = write!(out, "{value:0width$}");
        };
        match letter {
            'Y' => number(year, 4),
            'y' => number(year.rem_euclid(100), 2),
            'm' => number(month as i64, 2),
            'd' => number(day, 2),
            'H' => number(hour, 2),
            'I' => number(half_hour, 2),
            'M' => number(minute, 2),
            'S' => number(second, 2),
            'j' => number(january_first, 3),
            'w' => number(weekday as i64, 1),
            'e' => {
                let _ = write!(out, "{day:2}");
            }
            'B' => out.push_str(MONTHS[month - 1]),
            'b' | 'h' => out.push_str(&MONTHS[month - 1][..3]),
            'A' => out.push_str(DAYS[weekday]),
            'a' => out.push_str(&DAYS[weekday][..3]),
            'p' => out.push_str(if hour < 12 { "AM" } else { "PM" }),
            'F' => out.push_str(&self::format(time, "%Y-%m-%d")?),
            'T' => out.push_str(&self::format(time, "%H:%M:%S")?),
            'D' => out.push_str(&self::format(time, "%m/%d/%y")?),
            'R' => out.push_str(&self::format(time, "%H:%M")?),
            'Z' => out.push_str("UTC"),
            'z' => out.push_str("+0000"),
            '%' => out.push('%'),
            other => return Err(format!("strftime_now: %{other} is not supported")),
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn known_days() {
        let at = |seconds| UNIX_EPOCH + Duration::from_secs(seconds);
        assert_eq!(format(at(0), "%Y-%m-%d %A %H:%M:%S").unwrap(), "1970-01-01 Thursday 00:00:00");
        // 29 February 2024, 23:59:58, the 60th day of the year.
        let leap = at(1_709_251_198);
        assert_eq!(
            format(leap, "%d %b %Y %j %I:%M %p %a %y").unwrap(),
            "29 Feb 2024 060 11:59 PM Thu 24"
        );
        assert_eq!(format(leap, "%-d/%-m %e|%F %T|%%").unwrap(), "29/2 29|2024-02-29 23:59:58|%");
        assert_eq!(format(at(951_782_400), "%F %j").unwrap(), "2000-02-29 060");
        assert_eq!(format(at(4_107_542_400), "%F %j").unwrap(), "2100-03-01 060");
        assert_eq!(
            format(UNIX_EPOCH - Duration::from_secs(1), "%F %T").unwrap(),
            "1969-12-31 23:59:59"
        );
        assert!(format(at(0), "%Q").is_err());
        assert!(format(at(0), "%").is_err());
    }
}
