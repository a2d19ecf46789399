from .charts import Chart as Chart
from .data import (
    as_json as as_json,
    deployed_precision as deployed_precision,
    describe as describe,
    layer_shapes as layer_shapes,
    with_origin as with_origin,
)
from .operator_table import (
    operators_as_json as operators_as_json,
    operators_as_markdown as operators_as_markdown,
    print_operators as print_operators,
)
from .rendering import (
    REPORT_FILES as REPORT_FILES,
    Report as Report,
    print_parts as print_parts,
    rich_table as rich_table,
)
from .sections import Part as Part, Table as Table, figure as figure, ratio as ratio, section as section, size as size
