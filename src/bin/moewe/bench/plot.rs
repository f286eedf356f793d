//! The chart of `moewe bench --plot`: gaps over tokens, a panel a case, both axes logarithmic.

use std::fmt::Write as _;

use crate::svg;

/// The best that other engines did, by case and tokens: whole layers in CUDA graphs on one H100 80GB HBM3, gaps in
/// floors of 3.166 TB/s and 799 (bf16) or 1539 (FP8) TFLOP/s. Gaps compare across cards; times do not.
const PEERS: &str = include_str!("peers.csv");

const PANEL: [f64; 2] = [380.0, 260.0];
/// Left, top, right, bottom.
const MARGIN: [f64; 4] = [44.0, 34.0, 14.0, 32.0];
const HEADING: f64 = 56.0;
const COLUMNS: usize = 2;

/// A gap that was measured.
#[derive(Debug, Clone, PartialEq)]
pub struct Point {
    /// Of which case.
    pub case: String,
    /// How many tokens.
    pub tokens: usize,
    /// Which variant.
    pub fused: bool,
    /// Time in floors.
    pub gap: f64,
}

/// (tokens, gap), ascending.
type Line = Vec<(usize, f64)>;

/// Those of a case.
fn peers(case: &str) -> Line {
    let parse = |line: &str| {
        let mut fields = line.split(',');
        (fields.next()? == case).then_some(())?;
        let tokens = fields.next()?.parse().ok()?;
        Some((tokens, fields.nth(1)?.parse().ok()?))
    };
    PEERS.lines().filter_map(parse).collect()
}

/// The chart of `cases`.
pub fn svg(title: &str, cases: &[&str], points: &[Point]) -> String {
    let rows = cases.len().div_ceil(COLUMNS);
    let [width, height] = [PANEL[0] * COLUMNS as f64, HEADING + PANEL[1] * rows as f64];
    let mut text = svg::open(width, height, title);
    let legend = "gap = time / floor, over tokens. Blue: measured here (dashed: activation and quantisation as two steps). \
                  Grey: best CUDA peer, H100.";
    let _ = writeln!(text, "<text x=\"12\" y=\"40\" fill=\"#555\">{legend}</text>");
    for (at, case) in cases.iter().enumerate() {
        let origin = [(at % COLUMNS) as f64 * PANEL[0], HEADING + (at / COLUMNS) as f64 * PANEL[1]];
        panel(&mut text, origin, case, points);
    }
    text.push_str("</svg>\n");
    text
}

fn panel(text: &mut String, [left, top]: [f64; 2], case: &str, points: &[Point]) {
    let of = |fused: bool| -> Line {
        let here = points.iter().filter(|point| point.case == case && point.fused == fused);
        let mut line: Line = here.map(|point| (point.tokens, point.gap)).collect();
        line.sort_unstable_by_key(|(tokens, _)| *tokens);
        line
    };
    let lines =
        [(peers(case), "#999", ""), (of(true), "#1f5fbf", ""), (of(false), "#1f5fbf", " stroke-dasharray=\"5 3\"")];
    let all = || lines.iter().flat_map(|(line, _, _)| line);
    let most_tokens = all().map(|(tokens, _)| *tokens).max().unwrap_or(1).next_power_of_two().max(2);
    let most_gap = all().map(|(_, gap)| *gap).fold(2.0, f64::max) * 1.15;
    let least_gap = all().map(|(_, gap)| *gap).fold(1.0, f64::min);
    let [x0, y0] = [left + MARGIN[0], top + PANEL[1] - MARGIN[3]];
    let [x1, y1] = [left + PANEL[0] - MARGIN[2], top + MARGIN[1]];
    let x = |tokens: usize| x0 + (x1 - x0) * (tokens as f64).log2() / (most_tokens as f64).log2();
    let y = |gap: f64| y0 + (y1 - y0) * (gap / least_gap).ln() / (most_gap / least_gap).ln();
    let _ = writeln!(text, "<text x=\"{x0:.1}\" y=\"{:.1}\" font-weight=\"bold\">{case}</text>", y1 - 10.0);
    let _ = writeln!(text, "<path d=\"M{x0:.1} {y1:.1}V{y0:.1}H{x1:.1}\" fill=\"none\" stroke=\"#333\"/>");
    for power in (0..=most_tokens.ilog2()).step_by(2) {
        let at = x(1 << power);
        let _ =
            writeln!(text, "<text x=\"{at:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>", y0 + 16.0, 1 << power);
    }
    let decades = (0..9).flat_map(|decade| [1.0, 2.0, 5.0].map(|step| step * 10f64.powi(decade)));
    for gap in decades.take_while(|gap| *gap <= most_gap) {
        let at = y(gap);
        let _ = writeln!(text, "<path d=\"M{x0:.1} {at:.1}H{x1:.1}\" stroke=\"#ddd\"/>");
        let _ = writeln!(text, "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{gap}</text>", x0 - 5.0, at + 4.0);
    }
    for (line, colour, dash) in lines.iter().filter(|(line, _, _)| !line.is_empty()) {
        let places: Vec<[f64; 2]> = line.iter().map(|(tokens, gap)| [x(*tokens), y(*gap)]).collect();
        let path: Vec<String> = places.iter().map(|[x, y]| format!("{x:.1},{y:.1}")).collect();
        let path = path.join(" ");
        let _ = writeln!(
            text,
            "<polyline points=\"{path}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"1.5\"{dash}/>"
        );
        for [x, y] in places {
            let _ = writeln!(text, "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"2.5\" fill=\"{colour}\"/>");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::NAMES;

    #[test]
    fn every_row_of_the_peers_belongs_to_a_case() {
        let rows: usize = NAMES.iter().map(|case| peers(case).len()).sum();
        assert_eq!(rows, PEERS.lines().count() - 1);
        assert_eq!(peers("dsv3_fp8").first(), Some(&(1, 1.26)));
        assert_eq!(peers("dsv4_flash_fp4"), []);
    }

    #[test]
    fn a_chart_has_a_line_for_the_peers_and_for_each_variant() {
        let point = |tokens, fused, gap| Point { case: "dsv3_fp8".into(), tokens, fused, gap };
        let points = [point(16, true, 3.0), point(1, true, 2.0), point(1, false, 0.9)];
        let chart = svg("a <b>", &["dsv3_fp8", "dsv4_flash_fp4"], &points);
        assert_eq!(chart.matches("<polyline").count(), 3);
        assert_eq!(chart.matches("<circle").count(), 8 + 3);
        assert!(chart.contains("a &lt;b&gt;") && chart.ends_with("</svg>\n") && !chart.contains("NaN"), "{chart}");
    }
}
