//! What goes to the terminal: text, JSON, tables, progress.

use std::fmt::{self, Write as _};
use std::io::{self, IsTerminal, Write};
use std::sync::mpsc::RecvTimeoutError;
use std::time::Duration;

use anyhow::Context;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;

/// The command line makes no sense, though each option does: exit code 2.
#[derive(Debug)]
pub(crate) struct Usage(pub String);

impl fmt::Display for Usage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Usage {}

/// A check failed and has said so already: exit code 1 and no further word.
#[derive(Debug)]
pub(crate) struct Failed;

impl fmt::Display for Failed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a check failed")
    }
}

impl std::error::Error for Failed {}

/// The error and its causes in one line; a cause that the text before it quotes is not said twice.
pub(crate) fn one_line(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain() {
        let cause = cause.to_string();
        if text.is_empty() {
            text = cause;
        } else if !text.contains(&cause) {
            let _ = write!(text, ": {cause}");
        }
    }
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Writes to standard output at once; an error where it was closed, not a panic.
pub(crate) fn put(text: &str) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    Ok(out.flush()?)
}

/// Writes a line to standard output.
pub(crate) fn line(text: impl AsRef<str>) -> anyhow::Result<()> {
    let mut text = text.as_ref().to_owned();
    text.push('\n');
    put(&text)
}

/// Writes a value as indented JSON.
pub(crate) fn json(value: &impl Serialize) -> anyhow::Result<()> {
    line(serde_json::to_string_pretty(value)?)
}

/// Writes a value as JSON on one line.
pub(crate) fn json_line(value: &impl Serialize) -> anyhow::Result<()> {
    line(serde_json::to_string(value)?)
}

/// Says something beside the output, on standard error.
pub(crate) fn note(text: impl AsRef<str>) {
    let _ = writeln!(io::stderr().lock(), "{}", text.as_ref());
}

/// Reads a text file, or standard input for `-`.
pub(crate) fn read_text(path: &std::path::Path) -> anyhow::Result<String> {
    if path.as_os_str() == "-" {
        return io::read_to_string(io::stdin().lock()).context("standard input cannot be read");
    }
    std::fs::read_to_string(path).with_context(|| format!("{}: cannot be read", path.display()))
}

/// How often a bar of long work moves.
const WATCH: Duration = Duration::from_millis(150);

/// Progress on standard error; nothing where that is no terminal, or where JSON was asked for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Progress {
    shown: bool,
}

impl Progress {
    pub(crate) fn new(json: bool) -> Self {
        Self { shown: !json && io::stderr().is_terminal() }
    }

    fn bar(self, total: u64, what: &str, template: &str) -> ProgressBar {
        if !self.shown {
            return ProgressBar::hidden();
        }
        let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr());
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style.progress_chars("=> "));
        }
        bar.set_message(what.to_owned());
        bar
    }

    /// Of bytes.
    pub(crate) fn bytes(self, what: &str) -> ProgressBar {
        self.bar(1, what, "{msg:<12} [{bar:32}] {bytes}/{total_bytes} {bytes_per_sec}")
    }

    /// Runs long work that `done` can be asked about meanwhile, from this thread's side; nothing is shown of short work.
    pub(crate) fn watch<T>(
        self,
        what: &str,
        total: u64,
        done: impl Fn() -> u64 + Sync,
        work: impl FnOnce() -> T,
    ) -> T {
        if !self.shown {
            return work();
        }
        let done = &done;
        let before = done();
        let (finished, wait) = std::sync::mpsc::channel::<()>();
        std::thread::scope(|scope| {
            scope.spawn(move || {
                let mut bar = None;
                while wait.recv_timeout(WATCH) == Err(RecvTimeoutError::Timeout) {
                    let bar = bar.get_or_insert_with(|| self.bytes(what));
                    let at = done().saturating_sub(before);
                    bar.set_length(total.max(at));
                    bar.set_position(at);
                }
                if let Some(bar) = bar {
                    bar.finish_and_clear();
                }
            });
            let result = work();
            drop(finished);
            result
        })
    }

    /// Of things that are counted.
    pub(crate) fn count(self, total: usize, what: &str) -> ProgressBar {
        self.bar(total as u64, what, "{msg:<12} [{bar:32}] {pos}/{len} eta {eta}")
    }
}

/// Tells a bar of bytes how far a load is.
pub(crate) fn follow(bar: &ProgressBar) -> impl FnMut(u64, u64) + '_ {
    |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    }
}

/// A table of text: the first column to the left, the others to the right.
#[derive(Debug)]
pub(crate) struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    pub(crate) fn new(header: &[&str]) -> Self {
        Self { rows: vec![header.iter().map(ToString::to_string).collect()] }
    }

    pub(crate) fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().collect());
    }

    /// Lines under a header and a rule.
    pub(crate) fn to_text(&self) -> String {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |column: usize| {
            self.rows.iter().filter_map(|r| r.get(column)).map(|c| c.chars().count()).max()
        };
        let widths: Vec<usize> = (0..columns).map(|c| width(c).unwrap_or(0)).collect();
        let mut text = String::new();
        for (index, row) in self.rows.iter().enumerate() {
            let mut line = String::new();
            for (column, (cell, width)) in row.iter().zip(&widths).enumerate() {
                let gap = if column == 0 { "" } else { "  " };
                let _ = if column == 0 {
                    write!(line, "{gap}{cell:<width$}")
                } else {
                    write!(line, "{gap}{cell:>width$}")
                };
            }
            text.push_str(line.trim_end());
            text.push('\n');
            if index == 0 {
                let rule = widths.iter().sum::<usize>() + 2 * columns.saturating_sub(1);
                text.push_str(&"-".repeat(rule));
                text.push('\n');
            }
        }
        text
    }
}

/// Bytes with a unit.
pub(crate) fn bytes(n: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = n as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{n} B") } else { format!("{value:.1} {}", units[unit]) }
}

/// A number with so many significant digits as tell something.
pub(crate) fn figure(value: f64) -> String {
    match value.abs() {
        v if v >= 100.0 => format!("{value:.0}"),
        v if v >= 10.0 => format!("{value:.1}"),
        v if v >= 1.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

/// Milliseconds.
pub(crate) fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_line_up() {
        let mut table = Table::new(&["op", "bytes"]);
        table.row(["linear".to_owned(), "12".to_owned()]);
        table.row(["é".to_owned(), "123456".to_owned()]);
        assert_eq!(
            table.to_text(),
            "op       bytes\n--------------\nlinear      12\né       123456\n"
        );
    }

    #[test]
    fn sizes_have_units() {
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(1536), "1.5 KiB");
        assert_eq!(bytes(98_362_432), "93.8 MiB");
    }

    #[test]
    fn errors_are_one_line() {
        let error = anyhow::anyhow!("the end\n  of it").context("first");
        assert_eq!(one_line(&error), "first: the end of it");
        let quoted = anyhow::anyhow!("no such file").context("x: cannot open: no such file");
        assert_eq!(one_line(&quoted), "x: cannot open: no such file");
    }
}
