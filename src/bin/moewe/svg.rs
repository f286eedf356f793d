//! Charts as SVG text: what `bench --plot` and `run --plot` share.

use std::path::Path;

use crate::report::complain;

/// The beginning of a chart of this width and height: white, its title at the top.
pub fn open(width: f64, height: f64, title: &str) -> String {
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" font-family=\"sans-serif\" font-size=\"11\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
         <text x=\"12\" y=\"20\" font-size=\"13\">{}</text>\n",
        escaped(title)
    )
}

/// Text between tags.
pub fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

/// Writes a chart; whether that succeeded. If not, says why.
pub fn save(path: &Path, chart: &str) -> bool {
    match std::fs::write(path, chart) {
        Ok(()) => true,
        Err(error) => {
            complain(&format!("{}: the chart cannot be written ({error}); give another path", path.display()));
            false
        }
    }
}
