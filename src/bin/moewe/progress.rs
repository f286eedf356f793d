//! A bar on standard error, if that is a terminal: a file or a pipe wants none.

use std::io::{IsTerminal as _, Write as _};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Cells of a bar.
const WIDTH: u64 = 30;
/// Terminals are slower than what is counted.
const APART: Duration = Duration::from_millis(100);

/// Something long, while it lasts. Its line is gone when it is dropped.
pub struct Bar {
    began: Instant,
    /// What was drawn last, and when; `None` where nobody sees it.
    drawn: Option<Mutex<Drawn>>,
}

#[derive(Default)]
struct Drawn {
    what: String,
    at: Option<Instant>,
}

impl Bar {
    /// Nothing is drawn yet.
    pub fn new() -> Self {
        let terminal = std::io::stderr().is_terminal();
        Self { began: Instant::now(), drawn: terminal.then(Mutex::default) }
    }

    /// So much of all is done, and this is next.
    pub fn at(&self, what: &str, done: u64, all: u64) {
        let Some(drawn) = &self.drawn else { return };
        let mut drawn = drawn.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        if drawn.what != what || drawn.at.is_none_or(|last| now - last >= APART) {
            *drawn = Drawn { what: what.to_owned(), at: Some(now) };
            let line = line(what, done, all, now - self.began);
            let _ = write!(std::io::stderr().lock(), "\r{line}\x1b[K");
        }
    }

    /// Makes room for a line of text.
    pub fn clear(&self) {
        let Some(drawn) = &self.drawn else { return };
        let drawn = std::mem::take(&mut *drawn.lock().unwrap_or_else(PoisonError::into_inner));
        if drawn.at.is_some() {
            let _ = write!(std::io::stderr().lock(), "\r\x1b[K");
        }
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.clear();
    }
}

fn line(what: &str, done: u64, all: u64, elapsed: Duration) -> String {
    let share = if all == 0 { 0.0 } else { (done as f64 / all as f64).clamp(0.0, 1.0) };
    let full = (share * WIDTH as f64) as u64;
    let bar: String = (0..WIDTH).map(|cell| if cell < full { '█' } else { '░' }).collect();
    // Guessed from little it would jump about.
    let left = (share > 0.02).then(|| elapsed.mul_f64((1.0 - share) / share).as_secs());
    let left = left.map_or(String::new(), |left| format!(", {}:{:02} left", left / 60, left % 60));
    format!("{what} {bar} {:3.0} %{left}", 100.0 * share)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_has_the_share_and_the_time_that_is_left() {
        let text = line("packing", 1, 4, Duration::from_secs(30));
        assert!(text.starts_with("packing ███████░") && text.ends_with("░  25 %, 1:30 left"), "{text}");
        assert_eq!(text.chars().filter(|c| *c == '█' || *c == '░').count(), 30);
        assert!(line("x", 0, 0, Duration::ZERO).ends_with("░   0 %"));
        assert!(line("x", 9, 4, Duration::ZERO).ends_with("█ 100 %, 0:00 left"));
    }
}
