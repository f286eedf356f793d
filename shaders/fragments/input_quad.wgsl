// Four columns of an entering row from `col` on, 0 behind its last.
fn input_quad(input: u32, col: u32) -> vec4<f32> {
    if INPUT_STRIDE % 4u == 0u && col < COLS {
        return input_four(input + col);
    }
    var values = vec4<f32>();
    if col < COLS {
        values.x = input_value(input + col);
    }
    if col + 1u < COLS {
        values.y = input_value(input + col + 1u);
    }
    if col + 2u < COLS {
        values.z = input_value(input + col + 2u);
    }
    if col + 3u < COLS {
        values.w = input_value(input + col + 3u);
    }
    return values;
}
