//! A bar chart of tokens per expert.

use std::fmt::Write as _;

/// Lines of the largest chart. More experts share a line.
const LINES: usize = 64;
/// Columns of the longest bar.
const WIDTH: usize = 50;
const EIGHTHS: [&str; 8] = ["", "▏", "▎", "▍", "▌", "▋", "▊", "▉"];

/// How often each of `experts` was chosen. Ids out of range are counted nowhere.
pub fn count(ids: &[i32], experts: usize) -> Vec<u64> {
    let mut counts = vec![0; experts];
    for id in ids {
        if let Some(count) = usize::try_from(*id).ok().and_then(|id| counts.get_mut(id)) {
            *count += 1;
        }
    }
    counts
}

/// One line an expert, or a group of neighbours where they are many.
pub fn draw(counts: &[u64]) -> String {
    let group = counts.len().div_ceil(LINES).max(1);
    let sums: Vec<u64> = counts.chunks(group).map(|counts| counts.iter().sum()).collect();
    let most = sums.iter().copied().max().unwrap_or(0);
    let labels: Vec<String> = (0..sums.len()).map(|line| label(line * group, group, counts.len())).collect();
    let width = labels.iter().map(String::len).max().unwrap_or(0);
    let digits = most.to_string().len();
    let mut chart = String::new();
    for (label, sum) in labels.iter().zip(&sums) {
        let line = format!("  {label:>width$}  {sum:>digits$} {}", bar(*sum, most));
        // Writing to a string does not fail.
        let _ = writeln!(chart, "{}", line.trim_end());
    }
    chart
}

fn label(first: usize, group: usize, experts: usize) -> String {
    let last = (first + group).min(experts).saturating_sub(1);
    if first == last { first.to_string() } else { format!("{first}-{last}") }
}

/// `value` of `most` in eighths of a column; something, however short, if it is not 0.
fn bar(value: u64, most: u64) -> String {
    if value == 0 || most == 0 {
        return String::new();
    }
    let eighths = ((value as f64 / most as f64) * (8 * WIDTH) as f64).round().max(1.0) as usize;
    let (whole, rest) = (eighths / 8, eighths % 8);
    format!("{}{}", "█".repeat(whole), EIGHTHS.get(rest).unwrap_or(&""))
}

#[cfg(test)]
mod tests {
    use super::{count, draw};

    #[test]
    fn bars_are_in_proportion() {
        let chart = draw(&[4, 0, 2, 1]);
        let lines: Vec<&str> = chart.lines().collect();
        let blocks: Vec<usize> = lines.iter().map(|line| line.matches('█').count()).collect();
        assert_eq!(blocks, [50, 0, 25, 12]);
        assert_eq!(lines[1], "  1  0");
        assert!(lines[3].ends_with('▌'), "{chart}");
    }

    #[test]
    fn many_experts_share_64_lines() {
        let counts: Vec<u64> = (0..1000).collect();
        let chart = draw(&counts);
        assert_eq!(chart.lines().count(), 63);
        assert!(chart.lines().all(|line| line.chars().count() <= 80));
        assert!(chart.contains("992-999") && chart.starts_with("     0-15"), "{chart}");
    }

    #[test]
    fn ids_out_of_range_are_not_counted() {
        assert_eq!(count(&[0, 2, 2, -1, 3, i32::MAX], 3), [1, 0, 2]);
    }
}
