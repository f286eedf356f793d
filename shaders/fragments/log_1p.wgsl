// log(1 + e) for 0 <= e <= 1 as 2 atanh(e / (2 + e)): no digit is lost for small e, where 1 + e rounds.
fn log_1p(e: f32) -> f32 {
    let s = e / (2.0 + e);
    let s2 = s * s;
    var series = 1.0 / 15.0;
    series = series * s2 + 1.0 / 13.0;
    series = series * s2 + 1.0 / 11.0;
    series = series * s2 + 1.0 / 9.0;
    series = series * s2 + 1.0 / 7.0;
    series = series * s2 + 0.2;
    series = series * s2 + 1.0 / 3.0;
    series = series * s2 + 1.0;
    return 2.0 * s * series;
}
