from . import charts as charts, content as content, operator_table as operator_table, page as page
