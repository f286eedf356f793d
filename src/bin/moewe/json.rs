//! What both commands print as JSON.

use serde_json::Value;

/// A number; the strings "NaN", "inf" and "-inf" for what JSON lacks.
pub fn number(value: f64) -> Value {
    /// Integers up to here are exact in f64.
    const EXACT: f64 = 9_007_199_254_740_992.0;
    if value.is_nan() {
        "NaN".into()
    } else if value.is_infinite() {
        if value > 0.0 { "inf".into() } else { "-inf".into() }
    } else if value.fract() == 0.0 && value.abs() < EXACT {
        Value::from(value as i64)
    } else {
        Value::from(value)
    }
}

/// What a check or a case came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// Within tolerance.
    Pass,
    /// Wrong, or it could not be read.
    Fail,
    /// Not implemented.
    Unsupported,
}

impl Status {
    /// Its word.
    pub fn word(self) -> &'static str {
        match self {
            Self::Pass => "pass",
            Self::Fail => "fail",
            Self::Unsupported => "unsupported",
        }
    }

    /// Of an error.
    pub fn of(error: &moewe::Error) -> Self {
        if let moewe::Error::Unsupported(_) = error { Self::Unsupported } else { Self::Fail }
    }
}

#[cfg(test)]
mod tests {
    use super::number;

    #[test]
    fn what_json_lacks_is_a_string() {
        let text = |value: f64| number(value).to_string();
        assert_eq!([text(f64::NAN), text(f64::INFINITY), text(f64::NEG_INFINITY)], ["\"NaN\"", "\"inf\"", "\"-inf\""]);
        assert_eq!([text(0.0), text(-0.0), text(3.0), text(0.5)], ["0", "0", "3", "0.5"]);
    }
}
