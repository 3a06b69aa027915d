from dskd.cli import main

main()
