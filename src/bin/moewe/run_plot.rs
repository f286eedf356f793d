//! The chart of `moewe run --plot`: which experts the tokens chose, and where the time goes.

use std::fmt::Write as _;

use crate::engine::Timing;
use crate::svg;

const WIDTH: f64 = 860.0;
/// Left of what is drawn, where labels stand.
const LEFT: f64 = 170.0;
const RIGHT: f64 = 80.0;
/// A map of more tokens or outputs than this would be noise: then the load of each output is drawn.
const MOST_TOKENS: usize = 128;
const MOST_OUTPUTS: usize = 256;
/// Largest column and row of the map, and height of all rows.
const COLUMN: f64 = 34.0;
const CELL: f64 = 16.0;
const MAP_HEIGHT: f64 = 420.0;
const LOAD_HEIGHT: f64 = 48.0;
const BAR: f64 = 18.0;
const BLUE: &str = "#1f5fbf";

/// What a chart shows.
pub struct Picture<'a> {
    /// Its title.
    pub title: String,
    /// [T, k].
    pub topk_ids: &'a [i32],
    /// [T, k].
    pub topk_weights: &'a [f32],
    /// k.
    pub top_k: usize,
    /// Experts with weights; behind them zero experts.
    pub num_experts: usize,
    /// Tokens of each output that can be chosen.
    pub load: &'a [u64],
    /// Seconds of each step, where there are steps.
    pub timing: Option<&'a Timing>,
}

impl Picture<'_> {
    /// As SVG.
    pub fn svg(&self) -> String {
        let tokens = self.topk_ids.len() / self.top_k.max(1);
        let mut body = String::new();
        let mut top = 44.0;
        top = match tokens <= MOST_TOKENS && self.load.len() <= MOST_OUTPUTS {
            true => self.map(&mut body, top, tokens),
            false => self.loads(&mut body, top, tokens, 3.0 * LOAD_HEIGHT) + 24.0,
        };
        let bottom = self.stages(&mut body, top);
        let mut text = svg::open(WIDTH, bottom, &self.title);
        text.push_str(&body);
        text.push_str("</svg>\n");
        text
    }

    /// Width of an output's column.
    fn column(&self) -> f64 {
        ((WIDTH - LEFT - RIGHT) / self.load.len().max(1) as f64).min(COLUMN)
    }

    /// A cell for each choice, as dark as its weight, below the load of each output.
    fn map(&self, text: &mut String, top: f64, tokens: usize) -> f64 {
        let top = self.loads(text, top, tokens, LOAD_HEIGHT);
        let (width, height) = (self.column(), (MAP_HEIGHT / tokens.max(1) as f64).min(CELL));
        let all = width * self.load.len() as f64;
        let bottom = top + height * tokens as f64;
        let _ = writeln!(
            text,
            "<rect x=\"{LEFT:.1}\" y=\"{top:.1}\" width=\"{all:.1}\" height=\"{:.1}\" fill=\"#f4f6fa\"/>",
            bottom - top
        );
        let largest = self.topk_weights.iter().copied().filter(|weight| weight.is_finite()).fold(0.0, f32::max);
        let choices = self.topk_ids.iter().zip(self.topk_weights).enumerate();
        for (slot, (id, weight)) in choices {
            let Some(output) = usize::try_from(*id).ok().filter(|output| *output < self.load.len()) else { continue };
            let [x, y] = [LEFT + width * output as f64, top + height * (slot / self.top_k) as f64];
            let fill = shade(*weight, largest);
            let _ = writeln!(
                text,
                "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{:.2}\" height=\"{:.2}\" fill=\"{fill}\"/>",
                0.92 * width,
                0.92 * height
            );
        }
        for token in ticks(tokens) {
            let y = top + height * (token as f64 + 0.5) + 4.0;
            let _ = writeln!(text, "<text x=\"{:.1}\" y=\"{y:.1}\" text-anchor=\"end\">{token}</text>", LEFT - 6.0);
        }
        let _ = writeln!(text, "<text x=\"12\" y=\"{:.1}\" fill=\"#555\">token</text>", top + 12.0);
        // The scale of the shades.
        let x = LEFT + all + 14.0;
        for step in 0..=8 {
            let (weight, y) = (largest * step as f32 / 8.0, top + 10.0 * f64::from(8 - step));
            let fill = shade(weight, largest);
            let _ = writeln!(text, "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"12\" height=\"10\" fill=\"{fill}\"/>");
        }
        for (weight, y) in [(largest, top + 9.0), (0.0, top + 89.0)] {
            let _ = writeln!(text, "<text x=\"{:.1}\" y=\"{y:.1}\">{weight:.2}</text>", x + 16.0);
        }
        let _ = writeln!(text, "<text x=\"{x:.1}\" y=\"{:.1}\" fill=\"#555\">weight</text>", top + 106.0);
        self.outputs(text, bottom + 14.0);
        bottom.max(top + 110.0) + 38.0
    }

    /// A bar for each output, and a line at the mean.
    fn loads(&self, text: &mut String, top: f64, tokens: usize, height: f64) -> f64 {
        let most = self.load.iter().copied().max().unwrap_or(0).max(1);
        let idle = self.load.iter().filter(|load| **load == 0).count();
        let said = format!(
            "tokens of each of {} experts: {} tokens, {} a token, {idle} idle, {most} at most",
            self.load.len(),
            tokens,
            self.top_k
        );
        let _ = writeln!(text, "<text x=\"12\" y=\"{top:.1}\" font-weight=\"bold\">{said}</text>");
        let (top, bottom) = (top + 12.0, top + 12.0 + height);
        let width = self.column();
        for (output, load) in self.load.iter().enumerate().filter(|(_, load)| **load > 0) {
            let tall = height * *load as f64 / most as f64;
            let [x, y] = [LEFT + width * output as f64, bottom - tall];
            // Zero experts, which have no weights, are paler.
            let fill = if output < self.num_experts { BLUE } else { "#9db8e0" };
            let _ = writeln!(
                text,
                "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{:.2}\" height=\"{tall:.1}\" fill=\"{fill}\"/>",
                0.92 * width
            );
        }
        let all = width * self.load.len() as f64;
        let mean = self.load.iter().sum::<u64>() as f64 / self.load.len().max(1) as f64;
        let y = bottom - height * mean / most as f64;
        let _ = writeln!(text, "<path d=\"M{LEFT:.1} {y:.1}h{all:.1}\" stroke=\"#c03030\" stroke-dasharray=\"4 3\"/>");
        let _ = writeln!(
            text,
            "<text x=\"{:.1}\" y=\"{:.1}\" fill=\"#c03030\">mean {mean:.1}</text>",
            LEFT + all + 6.0,
            y + 4.0
        );
        let _ =
            writeln!(text, "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{most}</text>", LEFT - 6.0, top + 8.0);
        let _ = writeln!(text, "<path d=\"M{LEFT:.1} {bottom:.1}h{all:.1}\" stroke=\"#333\"/>");
        if height > LOAD_HEIGHT {
            self.outputs(text, bottom + 14.0);
            return bottom + 20.0;
        }
        bottom + 4.0
    }

    /// Numbers of outputs below what is drawn of them.
    fn outputs(&self, text: &mut String, y: f64) {
        let width = self.column();
        for output in ticks(self.load.len()) {
            let x = LEFT + width * (output as f64 + 0.46);
            let _ = writeln!(text, "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"middle\">{output}</text>");
        }
        let _ = writeln!(text, "<text x=\"12\" y=\"{y:.1}\" fill=\"#555\">expert</text>");
    }

    fn stages(&self, text: &mut String, top: f64) -> f64 {
        let Some(Timing { stages, method }) = self.timing else {
            let _ =
                writeln!(text, "<text x=\"12\" y=\"{top:.1}\" fill=\"#555\">the reference has no steps to time</text>");
            return top + 20.0;
        };
        let total: f64 = stages.iter().map(|(_, seconds)| seconds).sum();
        let most = stages.iter().map(|(_, seconds)| *seconds).fold(0.0, f64::max);
        let method = svg::escaped(method);
        let _ = writeln!(
            text,
            "<text x=\"12\" y=\"{top:.1}\" font-weight=\"bold\">time per stage: {:.4} ms in all ({method})</text>",
            1e3 * total
        );
        let mut y = top + 12.0;
        for (name, seconds) in stages {
            let share = |of: f64| if of > 0.0 { seconds / of } else { 0.0 };
            let long = (WIDTH - LEFT - 2.0 * RIGHT - 20.0) * share(most);
            let middle = y + 0.5 * BAR + 3.0;
            let _ = writeln!(
                text,
                "<text x=\"{:.1}\" y=\"{middle:.1}\" text-anchor=\"end\">{}</text>",
                LEFT - 6.0,
                svg::escaped(name)
            );
            let _ = writeln!(
                text,
                "<rect x=\"{LEFT:.1}\" y=\"{y:.1}\" width=\"{:.1}\" height=\"{:.1}\" fill=\"{BLUE}\"/>",
                long.max(0.5),
                BAR - 4.0
            );
            let _ = writeln!(
                text,
                "<text x=\"{:.1}\" y=\"{middle:.1}\">{:.4} ms, {:.1} %</text>",
                LEFT + long + 6.0,
                1e3 * seconds,
                100.0 * share(total)
            );
            y += BAR;
        }
        y + 12.0
    }
}

/// From nearly white to dark blue; what is no number is red.
fn shade(weight: f32, largest: f32) -> String {
    if !weight.is_finite() {
        return "#c03030".into();
    }
    let part = if largest > 0.0 { (weight / largest).clamp(0.0, 1.0) } else { 0.0 };
    let between = |light: f32, dark: f32| (light + (dark - light) * part).round() as u8;
    format!("#{:02x}{:02x}{:02x}", between(219.0, 8.0), between(231.0, 48.0), between(247.0, 107.0))
}

/// Some twenty numbers below `count`, evenly apart.
fn ticks(count: usize) -> impl Iterator<Item = usize> {
    let step = [1, 2, 4, 8, 16, 32, 64, 128].into_iter().find(|step| count / step <= 20).unwrap_or(256);
    (0..count).step_by(step)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn picture<'a>(ids: &'a [i32], weights: &'a [f32], load: &'a [u64], timing: Option<&'a Timing>) -> String {
        let title = "a <b>".into();
        Picture { title, topk_ids: ids, topk_weights: weights, top_k: 2, num_experts: 3, load, timing }.svg()
    }

    #[test]
    fn a_cell_stands_for_each_choice_and_a_bar_for_each_expert_and_stage() {
        let timing = Timing { stages: vec![("a&b".into(), 3e-3), ("c".into(), 1e-3)], method: "wall clock".into() };
        let chart = picture(&[0, 2, 3, -1], &[0.5, f32::NAN, 1.0, 0.0], &[1, 0, 1, 1], Some(&timing));
        // White ground, map, three choices, three loads, nine shades, two stages.
        assert_eq!(chart.matches("<rect").count(), 1 + 1 + 3 + 3 + 9 + 2, "{chart}");
        assert!(chart.contains("a &lt;b&gt;") && chart.contains("a&amp;b") && chart.ends_with("</svg>\n"));
        assert!(chart.contains("3.0000 ms, 75.0 %") && chart.contains("2 tokens, 2 a token, 1 idle"), "{chart}");
        // One choice is NaN, and nothing is written where that would show.
        assert_eq!((chart.matches("fill=\"#c03030\"/>").count(), chart.contains("NaN")), (1, false));
    }

    #[test]
    fn many_experts_are_bars_alone_inside_of_the_chart() {
        let load: Vec<u64> = (0..768).collect();
        let ids: Vec<i32> = (0..768).collect();
        let chart = picture(&ids, &vec![1.0; 768], &load, None);
        assert_eq!(chart.matches("<rect").count(), 1 + 767, "{chart}");
        assert!(chart.contains("no steps to time"));
        let xs = chart.split("<rect x=\"").skip(1).map(|rect| rect.split('"').next().unwrap().parse::<f64>().unwrap());
        assert!(xs.fold(0.0, f64::max) < WIDTH - RIGHT);
    }
}
