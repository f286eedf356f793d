// Four codes of a row.
fn word_of(row: u32, word: u32, factor: u32) -> u32 {
    var codes = 0u;
    for (var byte = 0u; byte < 4u; byte++) {
        let col = 4u * word + byte;
        if col < COLS {
            let bits = bitcast<u32>(source_value(row, col));
            codes |= encode_code(bits >> 31u, quotient(bits & 0x7fffffffu, factor)) << (8u * byte);
        }
    }
    return codes;
}
